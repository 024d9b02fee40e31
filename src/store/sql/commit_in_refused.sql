-- Why a message was not acknowledged inside a user's transaction. A statement of its own: it sees what
-- that one has waited for. No row: the transaction is not on the partition's node.
-- $1 group  $2 partition  $3 owner  $4 epoch  $5 reset epoch  $6 incarnation
select case when pg_postmaster_start_time() <> $6 then 'other_server'
            when (c.owner, c.epoch) is distinct from ($3, $4) then 'lease_lost'
            when c.reset_epoch <> $5 then 'reset'
            else 'acknowledged' end
  from shardmq.partition p
  left join shardmq.cursor c on c.group_name = $1 and c.partition = p.partition
 where p.partition = $2
