-- Gives partitions back, where they are still this owner's; rows locked by others are passed over.
-- $1 group  $2 partitions  $3 owners
with free as (
    select c.partition, c.owner
      from shardmq.cursor c
      join unnest($2::int[], $3::uuid[]) as a (partition, owner) using (partition, owner)
     where c.group_name = $1
     order by c.partition
       for no key update of c skip locked)
update shardmq.cursor c
   set member = null, owner = null
  from free
 where c.group_name = $1 and c.partition = free.partition and c.owner = free.owner
