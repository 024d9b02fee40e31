-- Takes free partitions of a topic: those without a member, and those whose member's lease has ended.
-- Rows locked by others are passed over. Each acquisition draws a new owner and raises the epoch, so
-- that what an earlier owner sends later is refused.
-- $1 topic  $2 group  $3 member  $4 at most  $5 whether ended leases may be taken  $6 of these only
with live as (
    select m.member from shardmq.member m where m.leased_until > shardmq.clock()),
free as (
    select c.partition
      from shardmq.cursor c join shardmq.partition p using (partition)
     where c.group_name = $2 and p.topic = $1 and p.state <> 'deleted'
       and c.partition = any ($6::int[])
       and (c.member is null
            or $5::bool and not exists (select from live where live.member = c.member))
       and exists (select from live where live.member = $3)
     order by c.partition
     limit $4
       for no key update of c skip locked)
update shardmq.cursor c
   set member = $3, owner = gen_random_uuid(), epoch = c.epoch + 1
  from free
 where c.group_name = $2 and c.partition = free.partition
returning c.partition, c.owner, c.epoch, c.reset_epoch, c.acked_id, c.acked_ahead::text,
          pg_postmaster_start_time()
