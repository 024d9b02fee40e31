-- Gives partitions back, where they are still this owner's.
-- $1 group  $2 partitions  $3 owners
update shardmq.cursor c
   set member = null, owner = null
  from unnest($2::int[], $3::uuid[]) as a (partition, owner)
 where c.group_name = $1 and c.partition = a.partition and c.owner = a.owner
